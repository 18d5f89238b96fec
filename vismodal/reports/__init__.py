"""What runs leave for people: tables, plots, pages that open without a network, and model cards."""
