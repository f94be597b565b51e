"""The data pipeline: raw rows in, rows in the released layouts out, a count at every stage (docs/build_data.md)."""
