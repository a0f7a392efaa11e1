"""Training: loop, optimizer, schedules, exact resume, checkpoints, trackers, live view."""
