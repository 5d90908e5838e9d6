"use strict";

// Swagger UI would take its configuration, and the document it shows, from the address.
history.replaceState(null, "", location.pathname + location.hash);

// It keeps a whole answer in memory before it shows any of it: a package has hundreds of gigabytes, and a stream
// of events no end.
const nothingEndlessIsTried = () => ({
  statePlugins: {
    spec: {
      wrapSelectors: {
        allowTryItOutFor: (_, system) => (state, path, method) =>
          system.specSelectors.specJson().getIn(["paths", path, method, "x-try-it-out"]) !== false,
      },
    },
  },
});

SwaggerUIBundle({
  url: "api-docs/swagger.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
  defaultModelsExpandDepth: 0,
  plugins: [nothingEndlessIsTried],
});
