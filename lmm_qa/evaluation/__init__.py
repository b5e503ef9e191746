"""Agreement of ratings with labels: metrics, evaluation, calibration, challenge submissions, the HTML report."""
