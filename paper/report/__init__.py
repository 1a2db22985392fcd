"""The report's build: numbers, tables and figures of stored runs, the checks of its text, and typesetting."""
