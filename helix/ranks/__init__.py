"""Ranks as processes: started, placed on hosts, joined to a group, watched, and named when they fail."""
