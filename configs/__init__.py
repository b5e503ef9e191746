"""The configurations, one YAML file each: inside an installed lmm_qa they are the package `lmm_qa.config_files`."""
