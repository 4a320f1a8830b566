"""The viewing rooms: queries, pages, reports, sweep tables, plans, trackers. What trains imports nothing from here."""
