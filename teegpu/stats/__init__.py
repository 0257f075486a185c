"""What happened, when, and what it adds up to: events, the recorder that takes them, and the numbers made of them."""
