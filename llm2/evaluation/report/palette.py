"""The colours of every figure. Blue and amber stay distinct for all types of colour blindness."""

SYSTEM1 = "#3A6EA5"  # blue: plain decoding, System 1
SYSTEM2 = "#E69F00"  # amber: guided decoding, System 2
WRONG = "#B5494E"  # muted red; always beside a mark or a word, never the only sign
INK = "#2B2F36"
GRID = "#E6E8EB"
