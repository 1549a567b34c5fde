"""Hardware comparison reports: records → blocks → one HTML file, Markdown with pictures, or a table for pandas."""
