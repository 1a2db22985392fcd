"""What the machine at hand can do, measured: `python -m helix calibrate` writes a file of conf/hardware."""
