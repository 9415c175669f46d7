"""The shipped configurations, one YAML file each."""
