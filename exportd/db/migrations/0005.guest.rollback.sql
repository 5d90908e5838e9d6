CREATE OR REPLACE FUNCTION exportd_set_package_expiry() RETURNS trigger
    LANGUAGE plpgsql
    SET timezone = 'UTC'
    AS $$
BEGIN
    IF NEW.status::text = 'completed' AND NEW.package_path IS NOT NULL AND NEW.package_expires_at IS NULL THEN
        NEW.completed_at := coalesce(NEW.completed_at, now());
        NEW.package_expires_at := NEW.completed_at + make_interval(days => NEW.package_retention_days);
    END IF;
    RETURN NEW;
END
$$;

DROP FUNCTION IF EXISTS exportd_tool_name(json);
