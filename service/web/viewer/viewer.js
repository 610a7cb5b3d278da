// Shows the OpenAPI document in Swagger UI. Nothing is asked of another host: no validator, no address of a document in the URL.
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#viewer",
  deepLinking: true,
  validatorUrl: null,
  queryConfigEnabled: false,
  presets: [SwaggerUIBundle.presets.apis],
});
