"""rwft inside other people's training loops; each module imports the library that it is for, and nothing else does."""
