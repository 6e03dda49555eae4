"""Configuration: every key with its type and unit, YAML files and overrides, and the reference made of them."""
