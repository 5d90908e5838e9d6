-- A trigger of exportd never makes a statement of the application fail.
-- depends: 0004.counting

-- Sets the expiry when a job is completed. UTC, because the table may hold times without a zone. A package whose expiry
-- cannot be computed, or does not fit the column, never expires.
CREATE OR REPLACE FUNCTION exportd_set_package_expiry() RETURNS trigger
    LANGUAGE plpgsql
    SET timezone = 'UTC'
    AS $$
DECLARE
    given CONSTANT record := NEW;
BEGIN
    IF NEW.status::text = 'completed' AND NEW.package_path IS NOT NULL AND NEW.package_expires_at IS NULL THEN
        NEW.completed_at := coalesce(NEW.completed_at, now());
        NEW.package_expires_at := NEW.completed_at + make_interval(days => NEW.package_retention_days::integer);
    END IF;
    RETURN NEW;
EXCEPTION WHEN OTHERS THEN
    RAISE WARNING USING MESSAGE = 'exportd cannot set the expiry of the package of a job: ' || SQLERRM;
    RETURN given;
END
$$;
