CREATE TABLE jobs (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    payload jsonb NOT NULL,
    run_at timestamptz NOT NULL DEFAULT now(),
    attempts int NOT NULL DEFAULT 0,
    error text,
    finished_at timestamptz
);
CREATE INDEX jobs_to_do ON jobs (run_at, id) WHERE finished_at IS NULL;

-- Sent when the INSERT is committed, once per transaction.
CREATE FUNCTION announce_jobs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NOTIFY jobs;
    RETURN NULL;
END $$;
CREATE TRIGGER announce AFTER INSERT ON jobs FOR EACH STATEMENT EXECUTE FUNCTION announce_jobs();

-- What the jobs of this example write.
CREATE TABLE invoices (order_id bigint NOT NULL, written_at timestamptz NOT NULL DEFAULT now());
