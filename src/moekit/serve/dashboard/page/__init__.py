"""The page of the dashboard: its HTML, and the style and scripts that it shares with the page of `moekit explain`."""
