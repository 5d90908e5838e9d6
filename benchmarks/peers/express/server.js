// What a team would write first: verify the token, SELECT the job, pipe a stream, count on "finish".
"use strict";

const fs = require("node:fs");
const path = require("node:path");
const { createRequire } = require("node:module");

// The modules are installed next to a copy of package.json, outside the source tree.
const load = createRequire(path.join(process.env.MODULES, "package.json"));
const express = load("express");
const jwt = load("jsonwebtoken");
const { Pool } = load("pg");

const pool = new Pool({ max: 10 }); // where to is in PGHOST and its like
const app = express();

app.get("/api/tool-registry/export-jobs/:jobId/download", async (req, res) => {
  let claims;
  try {
    const [, token] = (req.get("Authorization") || "").split(" ");
    claims = jwt.verify(token, process.env.SECRET, { algorithms: ["HS256"] });
  } catch {
    return res.status(401).json({ status: "error" });
  }
  const found = await pool.query(
    "SELECT user_id, status, package_path, package_expires_at FROM export_jobs WHERE job_id = $1",
    [req.params.jobId],
  );
  const job = found.rows[0];
  if (!job) return res.status(404).json({ status: "error" });
  if (job.user_id !== claims.userId && claims.role !== "admin") return res.status(403).json({ status: "error" });
  if (job.status !== "completed") return res.status(404).json({ status: "error" });
  if (job.package_expires_at && job.package_expires_at <= new Date()) return res.status(410).json({ status: "error" });

  const file = path.join(process.env.STORAGE, job.package_path);
  const { size } = await fs.promises.stat(file);
  res.set({
    "Content-Type": "application/gzip",
    "Content-Length": size,
    "Content-Disposition": 'attachment; filename="export.tar.gz"',
  });
  res.on("finish", async () => {
    await pool.query(
      "UPDATE export_jobs SET download_count = download_count + 1, last_downloaded_at = now() WHERE job_id = $1",
      [req.params.jobId],
    );
  });
  fs.createReadStream(file, { highWaterMark: 65536 }).pipe(res);
});

app.listen(Number(process.env.PORT), "127.0.0.1");
