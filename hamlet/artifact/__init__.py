"""The reproduction of the report: profiles, runs, tables, figures, claims. It uses the library; never the reverse."""
