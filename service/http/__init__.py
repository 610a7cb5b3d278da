"""HTTP around the routes: middleware, authentication, schemas, compression."""
