"""One module per sub-command of `hf-fsdp-qlora`; cli.py says what such a module has."""
