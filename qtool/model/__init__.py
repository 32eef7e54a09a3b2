"""What a network looks like, and the text it reads."""
