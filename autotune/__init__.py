"""The table factory: sweeps over the configs of every engine, and what is made of them. See README.md."""
