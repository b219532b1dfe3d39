"""Where pyrepr meets other people's software. None of it is imported before it is needed."""
