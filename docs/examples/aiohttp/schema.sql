CREATE TABLE stock (item text PRIMARY KEY, amount int NOT NULL);
INSERT INTO stock VALUES ('tea', 5), ('coffee', 5);
CREATE TABLE orders (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, item text REFERENCES stock, amount int NOT NULL);
