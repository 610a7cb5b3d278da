"""Tables of labelled images: CSV and its dialects, Excel text, JSON lines."""
