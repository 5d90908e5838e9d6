-- Links that download without a token: only the SHA-256 of each link's ticket is kept.
-- depends: 0005.life-of-a-package

CREATE TABLE IF NOT EXISTS exportd_download_links (
    ticket_sha256 bytea PRIMARY KEY,
    job_id uuid NOT NULL,
    user_id text NOT NULL,
    is_admin boolean NOT NULL,
    package_sha256 text,
    created_at timestamptz NOT NULL DEFAULT now(),
    start_until timestamptz NOT NULL,
    resume_until timestamptz NOT NULL,
    begun_at timestamptz,
    revoked_at timestamptz
);

COMMENT ON TABLE exportd_download_links IS 'exportd: links that download one package as one principal';

CREATE INDEX IF NOT EXISTS exportd_download_links_by_job ON exportd_download_links (job_id);

CREATE INDEX IF NOT EXISTS exportd_download_links_by_age ON exportd_download_links (resume_until);
