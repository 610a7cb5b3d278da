"""Request bodies: raw images, multipart forms, JSON with base64."""
