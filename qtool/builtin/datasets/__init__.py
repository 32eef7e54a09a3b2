"""Named texts to calibrate and measure on."""
