"""Text for calibration and evaluation, and the demo world."""
