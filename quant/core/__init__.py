"""Numbers, files and the machine: what every other room stands on."""
