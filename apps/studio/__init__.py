"""The studio: a web app that teaches, draws, keeps and recognises. It never trains itself: every job is a process."""
