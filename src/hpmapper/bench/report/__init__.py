"""Results shown: as Markdown, as one HTML file with plots, and the plots as PNG."""
