"""What is measured on every frame of a clip at native resolution, and what trees conclude from it."""
