"""Methods, orders and seeds side by side: specification, cells, statistics, tables and a page."""
