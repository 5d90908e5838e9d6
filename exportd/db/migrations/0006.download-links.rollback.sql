-- Every link is dead afterwards; new ones can be made at any time.

DROP TABLE IF EXISTS exportd_download_links;
