"""What a GPU server can make of what it gets: messages are captured on their way, and attacked as a server would."""
