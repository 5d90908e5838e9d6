import js from "@eslint/js";
import globals from "globals";

export default [
  { ignores: ["exportd/web/pages/static/vendor/"] },
  {
    files: ["exportd/web/pages/static/*.js"],
    languageOptions: { globals: globals.browser },
    rules: {
      ...js.configs.recommended.rules,
      // `const { exp, ...others } = claims` is how an object loses a field.
      "no-unused-vars": ["error", { ignoreRestSiblings: true }],
    },
  },
];
