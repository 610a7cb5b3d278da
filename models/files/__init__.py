"""Files on disk: atomic writes, records, weights, zip files, text encodings."""
