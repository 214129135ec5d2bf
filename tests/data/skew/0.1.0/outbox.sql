BEGIN TRANSACTION;
CREATE TABLE counters (
    kind TEXT, what TEXT, reason TEXT, count INTEGER NOT NULL, PRIMARY KEY (kind, what, reason)) WITHOUT ROWID;
INSERT INTO "counters" VALUES('update','delivered','',2);
INSERT INTO "counters" VALUES('update','enqueued','',2);
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, priority INTEGER NOT NULL,
    last INTEGER NOT NULL, at REAL NOT NULL, expires REAL, size INTEGER NOT NULL, body BLOB NOT NULL);
CREATE TABLE meta (
    id INTEGER PRIMARY KEY CHECK (id = 1), starts INTEGER NOT NULL, set_aside INTEGER NOT NULL,
    elapsed REAL NOT NULL, wall REAL NOT NULL);
INSERT INTO "meta" VALUES(1,1,0,1.18563576599990483373e+00,1.79539172379653739933e+09);
CREATE INDEX events_order ON events (priority DESC, seq);
CREATE INDEX events_worth ON events (last, priority, seq);
CREATE INDEX events_expiry ON events (expires) WHERE expires IS NOT NULL;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('events',2);
COMMIT;
PRAGMA user_version=1;
