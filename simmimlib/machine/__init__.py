"""What a run needs from the machine: device, processes, files, progress, provenance."""
