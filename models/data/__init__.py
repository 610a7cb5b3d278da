"""Data sets as people have them: files, tables and packed pixels -> labelled images, in one form."""
