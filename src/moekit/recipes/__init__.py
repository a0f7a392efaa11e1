"""Complete applications: data (YAML) with the small code that is only theirs."""
