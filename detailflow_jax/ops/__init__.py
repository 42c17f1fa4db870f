"""Pure functions on arrays: every formula of the papers lives here, once. No modules, no config."""
