-- A trigger of exportd never makes a statement of the application fail.
-- depends: 0004.counting

-- Sets the expiry when a job is completed, in the zone of the session that completes it. A package whose expiry cannot be
-- computed, or does not fit the column, never expires.
CREATE OR REPLACE FUNCTION exportd_set_package_expiry() RETURNS trigger
    LANGUAGE plpgsql
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

-- A column of the type json may hold escapes that no text can.
CREATE OR REPLACE FUNCTION exportd_tool_name(tool_data json) RETURNS text
    LANGUAGE plpgsql IMMUTABLE
    AS $$
BEGIN
    RETURN coalesce(tool_data ->> 'name', tool_data ->> 'toolName', '');
EXCEPTION WHEN OTHERS THEN
    RETURN '';
END
$$;

COMMENT ON FUNCTION exportd_tool_name(json) IS 'exportd: the name in tool_data; empty if it cannot be read';
