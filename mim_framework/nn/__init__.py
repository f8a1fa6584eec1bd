"""Plain modules and functions for methods: no config, no component."""
