"""Settings: the schema, and reading them from YAML with overrides."""
