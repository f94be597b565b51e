"""Scripts and style of the pages, as they are sent."""
