"""What others compute, called as their users call them; each file says what it needs."""
