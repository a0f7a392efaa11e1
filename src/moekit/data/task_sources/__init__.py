"""Named sources of examples: real data of registry packages, fetched by name, checked by hash, never vendored."""
