"""Published dataset formats that are no folders of images."""
