"""What the experts do: measures of routing records against nulls, causes, pages."""
